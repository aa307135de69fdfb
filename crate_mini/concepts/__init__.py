"""Concepts of a classifier: codes of word vectors, and tests of whether the classifier uses them.

    command -> pipeline -> word_vectors -> methods (clvqvae, kmeans) -> codebook_checks
            -> salience -> ablate -> faithfulness (probe) -> concept_words, llm_ratings
            -> report -> page, survey

types.py holds what the steps hand to each other. The classifier comes from labelled_texts,
finetune (`train.py --task classify`) and classifier.
"""
