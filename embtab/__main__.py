"""`python -m embtab` is `embtab`."""

from embtab.cli import main

if __name__ == "__main__":
    main()
