"""Foreign layouts and our own model folder: one layout a file, one ``Converter`` protocol, ``pack`` and ``verify``."""
