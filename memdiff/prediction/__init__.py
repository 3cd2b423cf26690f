"""Using what a run has trained: classifiers of finished runs, on new inputs and elsewhere."""
