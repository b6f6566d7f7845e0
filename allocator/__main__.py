"""``python -m kvheap``: the ``kvheap`` command."""

import sys

from kvheap.cli import main

if __name__ == "__main__":
    sys.exit(main())
