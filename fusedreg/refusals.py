"""What ``nn.LSTM`` can be passed to and :class:`fusedreg.LSTM` cannot: refused, with the remedy."""

from __future__ import annotations

from typing import Any


class Refusals:
    """The hooks by which torch announces what it is about to do to a module."""

    def __prepare_scriptable__(self) -> Any:
        """Called by ``torch.jit.script``."""
        raise RuntimeError(
            "torch.jit.script: expected a module that it can compile, got fusedreg.LSTM; use torch.compile or "
            "torch.export instead, or module.to_torch() for a plain nn.LSTM"
        )

    @property
    def qconfig(self) -> Any:
        """What ``torch.ao.quantization`` assigns to the modules it is to quantise: refused, but for ``None``."""
        if "_qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        if value is not None:
            raise NotImplementedError(
                "quantization: expected fusedreg.LSTM to be left out, got a qconfig for it; set its qconfig to None, "
                "or quantise module.to_torch()"
            )
        self.__dict__["_qconfig"] = None

    @qconfig.deleter
    def qconfig(self) -> None:
        self.__dict__.pop("_qconfig", None)
