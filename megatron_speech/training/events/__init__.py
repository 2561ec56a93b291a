"""What happens between the steps of training: one class per event, run by the loop in a stated order."""
