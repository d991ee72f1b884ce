"""``python -m spade_lens`` is ``spade-lens``."""

from spade_lens.cli import main

if __name__ == "__main__":
    main()
