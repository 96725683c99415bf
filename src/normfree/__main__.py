"""python -m normfree."""

from normfree.cli import main

if __name__ == "__main__":
    main()
