"""Methods: the ways to answer that an evaluation compares, ours and those it has to beat.

A method is a dataclass. It gets images and questions and gives back text. To add one, write the class and give it a
name in [`METHODS`]:

- a guide, which ranks the large model's visual tokens: subclass [`Guide`] in `guides.py`;
- anything else: subclass [`Method`], in a file of its own beside these.

[`evaluate`] then compares it with the others.
"""

from transformers_sgl.evaluation.methods.alone import Large, Small
from transformers_sgl.evaluation.methods.base import Answer, Batch, Method, Pair, Setting
from transformers_sgl.evaluation.methods.cdpruner import CDPruner
from transformers_sgl.evaluation.methods.downsample import Downsample
from transformers_sgl.evaluation.methods.guided import SGL, SGP, Confirmed, ConfirmedSGL, pair_answers
from transformers_sgl.evaluation.methods.guides import DivPrune, FastV, Guide, Oracle, Random
from transformers_sgl.evaluation.methods.unsure import Unsure
from transformers_sgl.evaluation.methods.visionzip import VisionZip

__all__ = [
    "GUIDED",
    "METHODS",
    "SGL",
    "SGP",
    "Answer",
    "Batch",
    "CDPruner",
    "Confirmed",
    "ConfirmedSGL",
    "DivPrune",
    "Downsample",
    "FastV",
    "Guide",
    "Large",
    "Method",
    "Oracle",
    "Pair",
    "Random",
    "Setting",
    "Small",
    "Unsure",
    "VisionZip",
    "find_method",
    "pair_answers",
]

METHODS: dict[str, Method] = {
    "large": Large(),
    "small": Small(),
    "sgp": SGP(),
    "sgl": SGL(),
    "sgp-first": SGP(from_first_layer=True),
    "sgp-facility": SGP(from_first_layer=True, settings={"selection": "facility_location"}),
    "sgp-facility-late": SGP(settings={"selection": "facility_location"}),
    "sgp-facility-prompt": SGP(
        from_first_layer=True, settings={"selection": "facility_location", "guidance": "prompt"}
    ),
    "sgp-dpp": SGP(from_first_layer=True, settings={"selection": "dpp"}),
    "sgl-facility": SGL(from_first_layer=True, settings={"selection": "facility_location"}),
    "sgp-vision": SGP(vision=True),
    "sgl-vision": SGL(vision=True),
    "confirmed": Confirmed(),
    "sgl-confirmed": ConfirmedSGL(),
    "unsure": Unsure(),
    "random": Random(),
    "fastv": FastV(),
    "oracle": Oracle(),
    "divprune": DivPrune(),
    "divprune-late": DivPrune(from_first_layer=False),
    "cdpruner": CDPruner(),
    "cdpruner-weighted": CDPruner(weight=0.5),
    "visionzip": VisionZip(),
    "visionzip-mean": VisionZip(by_class_token=False),
    "downsample": Downsample(),
    "sgp-last": SGP(queries="last"),
    "sgp-prompt": SGP(queries="prompt"),
    "sgp-generated": SGP(queries="generated"),
    "sgp-10%": SGP(layers=0.1),
    "sgp-30%": SGP(layers=0.3),
    "sgp-50%": SGP(layers=0.5),
    "sgp-70%": SGP(layers=0.7),
}
# The guided ones that an evaluation compares with every other method, and with what each adds to.
GUIDED = {
    "sgp": "",
    "sgl": "",
    "sgp-first": "sgp",
    "sgp-facility": "sgp-first",
    "sgp-facility-late": "sgp",
    "sgp-facility-prompt": "sgp-facility",
    "sgp-dpp": "sgp-first",
    "sgl-facility": "sgl",
    "sgp-vision": "sgp",
    "sgl-vision": "sgl",
    "confirmed": "sgp-vision",
    "sgl-confirmed": "sgl-vision",
    "unsure": "sgp",
}


def find_method(name: str) -> Method:
    """Looks a method up."""
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}: take some of {', '.join(METHODS)}.")
    return METHODS[name]
