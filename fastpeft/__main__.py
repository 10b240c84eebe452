"""`python -m fastpeft` is `fastpeft`."""

from fastpeft.cli import main

if __name__ == "__main__":
    main()
