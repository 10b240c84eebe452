"""`python -m benchmarks report` and `python -m benchmarks compare A B`; `--help` says more."""

import sys

from fastpeft.bench.report.command import main

sys.exit(main())
