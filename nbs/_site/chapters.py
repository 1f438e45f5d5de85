"""nbdev-test, whose workers begin with what most chapters import, and keep nothing of a chapter."""

from scsa_book.paths import importing

with importing():
    import scsa_book.explain.runs
    import scsa_book.training.run  # noqa: F401

from nbdev import test


class Shell(test.CaptureShell):
    "IPython keeps every shell until its process ends, and with it the networks and images of every chapter."

    def run_all(self, *args, **kwargs):
        super().run_all(*args, **kwargs)
        self.user_ns.clear()


test.CaptureShell = Shell

if __name__ == "__main__":
    test.nbdev_test()
