"""python -m prepare.emoset"""

import sys

from prepare import build

if __name__ == "__main__":
    sys.exit(build.main(["build", *sys.argv[1:]]))
