# A model repository as an image: docker build -t registry.example.com/nfold-models:1 -f models.Dockerfile FOLDER
# where FOLDER holds `repository/`, as `nfold fold --repository` made it. With components/image-volume `FROM scratch` will do.
FROM docker.io/library/busybox:1.37.0-musl
COPY repository /repository
