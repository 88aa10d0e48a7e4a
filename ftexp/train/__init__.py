"""Training methods: a name of the config and the function that does it."""

from ftexp.config import Method
from ftexp.train import classify, dpo, reward, rloo, sft

TRAINERS = {
    Method.sft: sft.train,
    Method.classify: classify.train,
    Method.reward: reward.train,
    Method.dpo: dpo.train,
    Method.rloo: rloo.train,
}
