"""Which layers are compiled without a GPU: a few in every run of the tests, and all by ``make kernels``.

``name:dtype:H:B:kind:precision`` as triton_pretended.py has them. The many have every kernel, and every number of rows
and of units that the tables of configurations know: tiles of 16, 32 and 64 rows, 8, 16 and 32 units, weights that are
held and weights that are read at each step, with the columns split between warps and without.
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
)
