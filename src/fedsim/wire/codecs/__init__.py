"""Codecs, which make marked leaves cost less: `encode` inside jit, `pack` and `unpack` for real (docs/codecs.md).

Begin with `form.py`: what a codec is. `table.py` has all of them by name, `chains.py` joins them; `levels.py` is what those
have in common that send one of a few levels.
"""

from __future__ import annotations

from fedsim.wire.codecs.casts import cast, float8
from fedsim.wire.codecs.chains import chain, closed, linked
from fedsim.wire.codecs.entropy import entropy_bound, entropy_coded
from fedsim.wire.codecs.form import Codec, Coded, Sent, cost, nbytes, read, travelling_count, write
from fedsim.wire.codecs.quantisers import quantise
from fedsim.wire.codecs.sparse import topk
from fedsim.wire.codecs.table import CODECS, codec
