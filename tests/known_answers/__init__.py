"""Known answers: numbers that are known before anything is computed, and guards against traps of the libraries.

Each answer has a sabotage twin: the guard is broken by hand, and the same answer must then fail. What a mirrored test
says already is not said again here.

| trap | where its answer and its twin are |
|---|---|
| accumulated steps are normalised piece by piece | `train/test_sft.py`: accumulation_changes_nothing, sabotage_mean_over_each_piece |
| NEFTune stays on after an error | `train/test_sft.py`: neftune_is_off_after_an_error |
| NEFTune makes noise while writing | `test_generation.py`: noise_of_training_never_reaches_completions |
| the loss is a mean of batch means | `test_evaluate.py`: loss_is_the_same_for_every_batch_size, sabotage_mean_of_batch_means |
| the loss depends on padding or packing | `test_loss.py`: left_padded_and_packed_rows |
| perplexities of two tokenizers are compared | `test_loss.py`: bits_per_byte_does_not_depend_on_the_tokenizer |
| perplexity of a uniform model is its vocabulary | `test_evaluate.py`: uniform_model |
| our loss is not the field's | `test_lm_eval.py`: log_likelihood_of_lm_evaluation_harness |
| right padding spoils completions | `test_evaluate.py`: completions_are_the_same_alone, sabotage_right_padding |
| the worst checkpoint is taken for the best | `test_loss.py`: best_perplexity_is_the_lowest |
| no supervised token, loss 0 | `test_loss.py`: nothing_to_learn_is_refused |
| F1 of labels depends on a library's default | `test_label_sets.py`: three_rows_and_an_undefined_label |
| thresholds are fitted on the rows they are scored on | `test_label_sets.py`: thresholds_of_chance_gain_nothing |
| empty answers leave the denominator | `test_generation.py`: three_empty_answers_of_ten |
"""
