"""Which layers are compiled without a GPU: a few in every run of the tests, and all by ``make kernels``.

``name:dtype:H:B:kind:precision`` as triton_pretended.py has them. The many have every kernel, and everything that the
tables of configurations give a call of any size (test_triton_tables.py): tiles of 16, 32 and 64 rows by 8, 16 and 32
units, weights that are held and weights that are read at each step, with the columns split between warps and without,
in a 16-bit type, in TF32 and in true float32.
"""

from __future__ import annotations

FEW = (
    "everything+probes:bfloat16:256:16:persistent:highest",
    "batch_norm+proj:bfloat16:64:12:step:highest",
    "layer_norm+groups:float16:64:12:step:highest",
    "none:bfloat16:64:12:step:highest",
)

# Each norm and none, by tiles of rows; types in turn.
_LAYERS = {
    "persistent": (
        (16, 32, 64),
        (
            ("everything", "bfloat16:1024", "highest"),
            ("everything_untied", "float32:512", "high"),
            ("everything_batch_norm", "float16:1024", "highest"),
            ("everything_layer_norm", "bfloat16:1024", "highest"),
        ),
    ),
    "step": (
        (16, 64),
        (
            ("everything_untied", "bfloat16:512", "highest"),
            ("everything_untied_batch_norm", "float32:512", "highest"),
            ("everything_tied_layer_norm", "float32:512", "high"),
        ),
    ),
}
# The tiles that those leave out, narrow layers among them: ``H:B``.
_OTHERS = {
    "everything:bfloat16:persistent:highest": "1:16 100:32 1064:16 1064:32 1064:64 2500:16 2500:32",
    "everything:bfloat16:step:highest": "1:16 1:32 1:64 16:32 17:1024 100:512 100:1024 136:1024 2500:16 2500:32",
    "everything:float32:persistent:high": "1:16 16:32 17:1024 650:32 1056:32 1056:64 1064:100 2500:16 2500:32 2500:64",
    "everything:float32:persistent:highest": "1:32 1064:16 1064:32 1064:64 2500:16 2500:32 2500:64",
    "everything_untied:bfloat16:persistent:highest": "17:1024 650:64 1056:32 1056:64",
    "everything_batch_norm:bfloat16:persistent:highest": "1:16 1:32 1:64 16:16 16:32",
    "everything_batch_norm:bfloat16:step:highest": "1:16 1:32 1:64 2500:32",
    "everything_batch_norm:float32:persistent:highest": "1:16 1:32 1:64",
    "everything_tied_layer_norm:bfloat16:persistent:highest": "72:512 650:16 1300:16 1300:32 2500:16 2500:32",
    "everything:float32:step:high": "1:16 1:32 1:64 16:16 16:32 17:1024 65:1024 136:1024 1056:32 2500:16 2500:32",
    "everything:float32:step:highest": "1:16 1:32 1:64 65:1024 136:1024 1056:32 2500:16 2500:32",
    "everything_batch_norm:float32:persistent:high": "1:16 1:32 1:64 16:32",
    "everything_batch_norm:float32:step:high": "1:16 1:32 1:64 33:16 33:32 2500:32",
    "everything_batch_norm:float32:step:highest": "1:32",
    "everything_tied_layer_norm:float32:persistent:high": "33:1024 72:512 1064:16 1064:32 2500:16 2500:32",
    "everything_untied:float32:persistent:high": "1056:16",
    "everything_untied_batch_norm:float32:persistent:high": "650:16 650:32",
}
MANY = (
    *FEW,
    *(
        f"{name}:{size}:{tile}:{kind}:{precision}"
        for kind, (tiles, layers) in _LAYERS.items()
        for name, size, precision in layers
        for tile in tiles
    ),
    # True float32, read at each step; wider programs, where there are more units than multiprocessors' shares of 8.
    "everything:float32:256:16:persistent:highest",
    "everything:float32:256:64:persistent:highest",
    "everything:bfloat16:2048:16:persistent:highest",
    "everything:bfloat16:3000:64:persistent:highest",
    # With a projection, with probes, and in groups.
    "everything+proj+probes:bfloat16:512:16:step:highest",
    "everything_untied+proj:float32:512:64:step:highest",
    "everything_batch_norm+proj+probes:float16:512:32:step:highest",
    "everything_layer_norm+proj+groups:bfloat16:512:32:step:highest",
    "everything_untied+probes+groups:bfloat16:512:32:persistent:highest",
    *(
        ":".join((name, dtype, size, kind, precision))
        for name, dtype, kind, precision, sizes in ((*layer.split(":"), sizes) for layer, sizes in _OTHERS.items())
        for size in sizes.split()
    ),
)
