"""The trainers that users run, with plain PEFT, with others and with fastpeft: `--help` says what there is to choose."""

import sys

from fastpeft.bench.finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
