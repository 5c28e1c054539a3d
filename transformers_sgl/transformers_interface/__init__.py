"""The parts of transformers, beyond its documented API, that this package relies on.

When a new release of transformers breaks this package, mend it here: no other file imports an undocumented module of
transformers or names one of its private attributes. Each entry says what it assumes and what breaks without it; unless
it says since when, it holds in every supported version. `tests/test_transformers_interface.py` checks each entry.

    caches        the cache, which 5.24 renamed, and what can be cut off from it
    attention     attention functions and the arguments of decoder layers
    generation    decoding loops, inputs that grow, defaults of generation settings
    loading       Auto classes, commits and configurations
    images        what processors tell about images

Nothing is imported from transformers before it is asked for, so importing this package costs nothing; what is missing
fails where it is used, with a sentence that names it.
"""

from transformers_sgl.transformers_interface import attention, caches, generation, images, loading
from transformers_sgl.transformers_interface.attention import *
from transformers_sgl.transformers_interface.caches import *
from transformers_sgl.transformers_interface.generation import *
from transformers_sgl.transformers_interface.images import *
from transformers_sgl.transformers_interface.loading import *

__all__: list[str] = []
__all__ += attention.__all__
__all__ += caches.__all__
__all__ += generation.__all__
__all__ += images.__all__
__all__ += loading.__all__
