"""``python -m train --config FILE [--a.b value …]``, alone or under torchrun."""

from navit_clip.training.__main__ import main

if __name__ == "__main__":
    main(prog="python -m train")
