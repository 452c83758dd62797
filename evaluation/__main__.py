"""python -m evaluation run|cases|table|rate"""

import sys

from evaluation import evaluate

if __name__ == "__main__":
    sys.exit(evaluate.main(sys.argv[1:]))
