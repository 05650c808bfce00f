"""How the embedded story model is made: skeletons, lexicon, corpus, pretraining."""
