"A byte flipped or a tail cut in every kind of file that is written and read again"
from fault_cases import case,outcome
