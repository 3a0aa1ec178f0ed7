# SPDX-License-Identifier: Apache-2.0
"""What all metadata builders share that serve layers of the same pages.

vLLM makes several builders for a layer: the model runner's, which serves all layers of a cache
group, a drafter's own beside it, and one for layers that read another layer's cache. A layer's
16-bit copies exist once, so there must be one map that says where they are: with two maps, a slot
that the one gave to a tile would be overwritten through the other.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from turbokv.integrations.vllm.window.pool import RecentWindow


class SharedPages:
    """State of the pages of a set of layers.

    Attributes
    ----------
    has_target_layers
        Whether any of the layers that it was made for belongs to the target model.
    window
        The map of 16-bit copies; None until a builder makes one.
    """

    def __init__(self, has_target_layers: bool) -> None:
        self.has_target_layers = has_target_layers
        self.window: RecentWindow | None = None
        # weak, so that caches of a profiling run can be freed
        self._caches: dict[int, weakref.ref[Tensor]] = {}

    def serves(self, layer: Any) -> bool:
        """Whether this is about the cache that a layer has now."""
        cache = self._caches.get(id(layer))
        return cache is not None and cache() is layer.kv_cache

    def add(self, layer: Any) -> None:
        """Serve ``layer``, which stores keys and values, from now on."""
        self._caches[id(layer)] = weakref.ref(layer.kv_cache)
        layer.impl.shared_pages = self


def shared_pages(layers: list[Any]) -> SharedPages:
    """Return what is shared by builders of these layers, made by the first of them.

    Parameters
    ----------
    layers
        vLLM's attention layers that store what the builder's layers read.

    Returns
    -------
    SharedPages
        One for all of ``layers``. A builder of more layers than the one that came first makes it
        anew, and so does the first builder after the caches were allocated again.
    """
    found = layers[0].impl.shared_pages
    if found is not None and all(
        layer.impl.shared_pages is found and found.serves(layer) for layer in layers
    ):
        pages: SharedPages = found
        return pages
    made = SharedPages(any(not layer.impl.is_draft for layer in layers))
    for layer in layers:
        made.add(layer)
    return made
