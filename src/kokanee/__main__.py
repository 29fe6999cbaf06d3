"""`python -m kokanee`: the same as `kokanee`."""

from kokanee.cli import main

if __name__ == "__main__":
    main()
