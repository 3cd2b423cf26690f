"""From a data set's name to long-tailed arrays and to batches on devices."""
