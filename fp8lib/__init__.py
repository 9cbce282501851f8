"""Block-wise FP8 quantization of Qwen3.5/3.6 checkpoints, tensor by tensor, without building the model."""

__version__ = "0.2.0"


class Fp8Error(Exception):
    """The one exception a caller needs to catch: an input, flag or disk that cannot be used.

    The message names the file or tensor, says what is wrong and what to do about it, in one line.
    """
