"""Training methods: a name of the config and the function that does it."""

from ftexp.config import Method
from ftexp.train import sft

TRAINERS = {
    Method.sft: sft.train,
}
