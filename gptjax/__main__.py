"""`python -m gptjax` is the command `gptjax`, where that is not on the path."""

import sys

from gptjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
