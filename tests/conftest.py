"""Before anything imports a kernel: Triton kernels run in its interpreter, on CPU tensors."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
