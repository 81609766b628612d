"Disk full, folders without write permission, limited memory, clocks set back, interrupts"
from fault_cases import case,outcome
