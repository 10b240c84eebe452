"""The trainers that users run, with plain PEFT, with others and with fastpeft; `--help` names the choices."""

import sys

from fastpeft.bench.finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
