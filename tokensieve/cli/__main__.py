"""``python -m tokensieve.cli``."""

from tokensieve.cli import main

if __name__ == "__main__":
    main()
