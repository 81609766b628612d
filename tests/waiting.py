"Waiting for other programs, for the tests and scripts that start some"
import time


def wait_until(condition, what='need it', seconds=120, pause=.02):
    "What `condition()` gives as soon as it is true"
    end = time.monotonic()+seconds
    while not (result := condition()):
        if time.monotonic() > end: raise TimeoutError(f'{what} within {seconds} s')
        time.sleep(pause)
    return result
