"""What a training will take, predicted from a configuration or a loaded model, and the policy that is chosen for it."""
