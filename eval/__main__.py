"""``python -m eval zeroshot | retrieval | summary``, alone or under torchrun."""

from navit_clip.evaluation.__main__ import main

if __name__ == "__main__":
    main(prog="python -m eval")
