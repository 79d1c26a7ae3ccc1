"""How much is opened at most; what is beyond is refused by name, before it takes memory."""

MAX_FILE_BYTES = 2**30
MAX_PIXELS = 2**27  # of an image, also after resizing: 0.5 GB as Pillow holds it
MAX_TEXT_BYTES = 2**26  # of a text or colour profile in a PNG, unpacked; Pillow itself takes 1 MB
MAX_GREY = 65535  # of a 16-bit grey, which becomes white where nothing else is said
MAX_ARRAY_BYTES = 2**38  # of a file of arrays, which are also measured against the memory
MAX_CLASSES = 500_000
MAX_FILES = 50_000_000  # of a class
