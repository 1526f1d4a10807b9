"""Why a quantized student is as good as it is: numbers and pictures of ``grace analyze``, one concept a file."""
