"""Known answers: numbers that are known before anything is computed, and guards against traps of the libraries.

Each answer has a sabotage twin: the guard is broken by hand, and the same answer must then fail. What a mirrored test
says already is not said again here.

`traps.py` lists the traps P1 to P33, each with the tests that hold its answer and the twins; `test_traps.py` checks that
they are there. Other answers that stand elsewhere:

| trap | where its answer and its twin are |
|---|---|
| the loss depends on padding or packing | `test_loss.py`: left_padded_and_packed_rows |
| our loss is not the field's | `test_lm_eval.py`: log_likelihood_of_lm_evaluation_harness |
"""
