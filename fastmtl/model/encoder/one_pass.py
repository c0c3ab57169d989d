"""The check that one backward pass gives the task gradients of a model of transformers."""

from __future__ import annotations

import torch

from fastmtl.errors import UserError
from fastmtl.model.encoder.transformers_encoder import TransformersEncoder
from fastmtl.surgery.attach.attachment import Attachment
from fastmtl.surgery.rules.general import UnsupportedModule
from fastmtl.surgery.sinks.make import make_sink


def check_one_pass(encoder: TransformersEncoder, method: str) -> None:
    """Raise UserError if surgery cannot attach to the encoder's model.

    The model runs forward once, on two short texts of two tasks. Whether its rows mix shows in the
    first training step, which is compared with a backward pass per task. method: for the message.
    """
    shared = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    device = shared[0].device
    sink = make_sink("replay", shared, 2, sparse=(), dtype=torch.float32, reduce="local", sketch_size=16)
    training = encoder.training
    try:
        attached = Attachment(encoder.model, shared, ["first", "second"], device)
        try:
            attached.begin(sink)
            with torch.random.fork_rng(devices=[]), sink.armed(device), attached.rows([(0,), (1,)]):
                encoder.eval().run_tried()
        finally:
            attached.forget()
            attached.detach()
    except UserError as error:
        what = error.what if isinstance(error, UnsupportedModule) else str(error)
        raise UserError(
            f"gradient.method: {method} needs task gradients of {type(encoder.model).__name__}, and {what}: use "
            "gradient.method: sum, encoder.freeze: true, or another encoder"
        ) from None
    except Exception as error:  # a module that gets the rows of one task may raise anything
        name = type(encoder.model).__name__
        raise UserError(
            f"gradient.method: {method} needs task gradients of {name}, whose modules do not run on the rows of one "
            f"task ({type(error).__name__}: {error}): use gradient.method: sum, encoder.freeze: true, or another "
            "encoder"
        ) from error
    finally:
        encoder.train(training)
