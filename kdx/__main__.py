"""`python -m kdx`."""

from kdx.cli import main

if __name__ == "__main__":
    main()
