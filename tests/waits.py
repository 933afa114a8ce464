"""Records what in a computation waits for the device, as far as it shows without one."""

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What a host can only answer once the device has come that far.
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")
READS += ("__index__", "__contains__", "__array__", "to")
LATER_READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}


class Calls(TorchFunctionMode):
    """Names of methods in READS that are called on tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        places = (*args[1:], *(kwargs or {}).values())
        to_device = name == "to" and not any(isinstance(p, str) and p == "cpu" for p in places)
        if name in READS and not to_device:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Names of operators whose result's value or shape the host waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in LATER_READS or sized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Copies between host and device that one of the two waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("copy_", "_to_copy"):
            source = args[1 if name == "copy_" else 0]
            waits = not any(arg is True for arg in (*args, (kwargs or {}).get("non_blocking")))
            if source.device.type != out.device.type and waits:
                self.found.append(name)
        return out
