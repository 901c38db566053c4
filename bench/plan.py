"""`cjepa-plan`, from the source tree: what a training takes of memory, time and energy."""

import sys

from cjepa_fast.tools.plan import main

if __name__ == "__main__":
    sys.exit(main())
