"""python -m prepare.emotic"""

import sys

from prepare import build

if __name__ == "__main__":
    sys.exit(build.main(["emotic", *sys.argv[1:]]))
