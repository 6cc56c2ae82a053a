"""``python -m cka_hooks`` is ``cka-hooks``."""

import sys

from cka_hooks.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
