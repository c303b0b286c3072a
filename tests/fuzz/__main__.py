"""`python -m tests.fuzz`: random and broken input to everything, to find an exception that is no `AttnkitError`."""

import sys

from tests.fuzz.sweep import main

if __name__ == "__main__":
    sys.exit(main())
