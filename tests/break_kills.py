"Processes killed at random points: the run notebook, a grid and its workers, two programs in one cache"
from fault_cases import case,outcome
