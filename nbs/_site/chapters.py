"""nbdev-test, with its options, whose workers begin with what most chapters import."""

from scsa_book.paths import importing

with importing():
    import scsa_book.explain.runs
    import scsa_book.training.run  # noqa: F401

from nbdev.test import nbdev_test

if __name__ == "__main__":
    nbdev_test()
