# What every shell on a node of the cluster should know; install.sh makes ~/.bashrc read it.
export PATH="$HOME/venv/bin:$PATH"
# Nobody without the token in ~/.ray/auth_token.
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
# The server of mlflow.sh, on the head, where drivers run.
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-http://127.0.0.1:5000}"
