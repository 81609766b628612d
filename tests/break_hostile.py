"Input that somebody made to do harm: sizes, paths, names, code"
from fault_cases import case,outcome
