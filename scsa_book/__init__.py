__version__ = "0.1.0"

from scsa_book.renamed import install

install()
