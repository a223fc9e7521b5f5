"""What a model's card says that no computation can know."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CardConfig:
    """Statements of whoever publishes the model; what is empty stands in the card as "not stated".

    Attributes:
        license: of the model, best as an SPDX identifier such as apache-2.0.
        owner: person or team that answers for the model.
        contact: where questions go: a mail address or a link.
        dataset: what the images are and where they come from.
        intended_use: what the model is meant for.
        limits: what it is not meant or known to be good for, one sentence each; computed ones are added.
        pictures: whether the page shows images of the data set. Where they must not be seen by all who get the model,
            it shows figures alone.
    """

    license: str = ""
    owner: str = ""
    contact: str = ""
    dataset: str = ""
    intended_use: str = ""
    limits: tuple[str, ...] = ()
    pictures: bool = True
